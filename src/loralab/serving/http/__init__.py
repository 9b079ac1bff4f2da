"""HTTP: the application, its bodies and answers, and who is let in."""
