"""What a run trains on: several data sets as one, some of their classes, some of their images."""
