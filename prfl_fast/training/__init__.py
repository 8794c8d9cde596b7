"""Training real models: encoded data, and what the recipes need."""
