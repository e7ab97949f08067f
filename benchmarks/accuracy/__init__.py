"""What sampling costs in accuracy, and how well the estimators estimate."""
