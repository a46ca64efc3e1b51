"""Measures how fast the engines and the trainer of a topology are, by really loading them."""
