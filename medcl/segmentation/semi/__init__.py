"""Semi-supervised methods: what fine-tuning learns from unlabelled images."""
