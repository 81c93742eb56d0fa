"""Stage 4: teacher, student and exported versions side by side."""
