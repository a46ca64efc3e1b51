"""A corpus of questions from raw data sets, by the rules of a recipe."""
