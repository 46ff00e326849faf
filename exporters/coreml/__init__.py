"""Transformers into one multifunction Core ML package (iOS 18), on any operating system."""
