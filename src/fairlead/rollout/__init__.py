"""Sampling responses and scoring them by text."""
