"""The network that is pretrained: built, initialised, averaged and exported."""
