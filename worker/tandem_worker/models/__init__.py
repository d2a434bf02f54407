"""Dense decoder models from Hugging Face directories, in one config-driven file."""
