"""What a run and a bench show to people: pages, charts, cards."""
