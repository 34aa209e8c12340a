"""Reading a spelled-out attention, proving what its mask says, and calling the fused operator in its place."""
