"""nerfacc's folder of estimators."""
