"""From images to a matrix of rows: in memory, in a file, or in a folder that is mapped."""
