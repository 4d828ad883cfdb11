"""Learns: clusters, gradients, strategies, training. Knows arrays and torch; nothing of HTTP, Redis, Label Studio."""
