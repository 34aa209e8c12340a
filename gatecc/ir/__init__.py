"""What a captured graph means: programs, sites, masks, gates, contracts, and the checks on them."""
