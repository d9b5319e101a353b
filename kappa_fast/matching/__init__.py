"""From the names of entries to the parameters of a model: wrappers, pieces, names on disk and of llama.cpp."""
