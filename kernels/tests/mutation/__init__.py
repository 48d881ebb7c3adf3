"""Does the suite notice a wrong kernel? Faults planted one at a time in a copy of the package."""
