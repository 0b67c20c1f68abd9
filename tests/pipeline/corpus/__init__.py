"""Inputs gone bad in more than two hundred ways, made by code from real CT, each with what must become of it."""
