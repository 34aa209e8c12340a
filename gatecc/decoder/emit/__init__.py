"""The step, written as a program and lowered to what runs."""
