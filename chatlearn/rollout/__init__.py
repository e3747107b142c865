"""Engines that answer prompts, behind one protocol of seven verbs."""
