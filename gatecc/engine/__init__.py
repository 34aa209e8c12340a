"""A model through the compiler: analyse, plan, install, check contracts, blame."""
