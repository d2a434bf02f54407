"""One request from arrival to accounting: tier, tries, stream, resume."""
