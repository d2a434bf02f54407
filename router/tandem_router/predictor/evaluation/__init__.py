"""What a predictor is worth: metrics, baselines, the verdict, the report."""
