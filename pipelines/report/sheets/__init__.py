"""Sheets of images to look at: neighbours, samples of a data set, what a search or a head found."""
