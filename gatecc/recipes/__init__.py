"""Recipes, one family a file: a paper is a name, a citation and a list of rewrites."""
