"""Stage 2: a teacher and text become a small student."""
