"""Step rules: where positions meet, the past enters through a slot of the state."""
