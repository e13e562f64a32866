"""Int8 recipes: measured against each other, the best of those that keep their F1 is written."""
