"""What takes a selection to the tools that people train with: PEFT, transformers, and the files of other programs."""
