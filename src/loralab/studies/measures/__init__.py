"""The measures of trials: each file trains or times something and makes a record of it."""
