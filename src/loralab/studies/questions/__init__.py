"""One file per question: arms(ground, base), MEASURE, conclude(records, ground)."""
