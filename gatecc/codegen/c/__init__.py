"""Plain C as loaded libraries: built by the system's compiler when they are first needed, and kept."""
