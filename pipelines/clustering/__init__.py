"""Clustering: how the embeddings of a data set become classes of its images, without labels."""
