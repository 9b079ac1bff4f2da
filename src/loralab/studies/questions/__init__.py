"""One file per question, each: arms(ground), measure(cell, folder), conclude(records, ground)."""
