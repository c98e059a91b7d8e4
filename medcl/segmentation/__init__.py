"""Fine-tuning and prediction of segmentation networks."""
