"""Engines that run many models at once, each in a module of its own that needs an extra of the same name."""
