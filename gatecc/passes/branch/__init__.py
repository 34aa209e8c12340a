"""Branch: a parallel sub-graph beside a value of a site, and the bodies that it may have."""
