"""Damaged files: every reader refuses them with a named error, soon, and without asking for memory they do not fill."""
