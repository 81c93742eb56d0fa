"""Stage 1: labelled text becomes a fine-tuned teacher."""
