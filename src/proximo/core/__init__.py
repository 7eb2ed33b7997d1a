"""Pure functions of tensors and small frozen values; imports torch and nothing heavier."""
