"""From image and text to tokens and back."""
