"""Serves Label Studio: events in, jobs, predictions out. Imports `model`, never the reverse."""
