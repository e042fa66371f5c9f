"""Decisions about bits as pure functions on plain numbers and arrays, one file per idea."""
