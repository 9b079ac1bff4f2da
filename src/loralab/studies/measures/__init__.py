"""What a trial measures: each file trains or times something and makes a record of it."""
