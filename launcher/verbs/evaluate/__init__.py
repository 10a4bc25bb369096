"""`mhe evaluate`: what a trained backbone can do, by the protocols of the field."""
