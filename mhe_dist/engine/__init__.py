"""The DeepSpeed engine: one optimizer step of the backbone, and its state on any ZeRO stage."""
