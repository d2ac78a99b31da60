"""Commands that are no trainer: all steps in one run, the demo, best-of-n samples, chat, conversion."""
