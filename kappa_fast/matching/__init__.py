"""Matching of ranked entries with the parameters of a model: wrappers, parts, names on disk and of llama.cpp."""
