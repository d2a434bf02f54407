"""Quality as it is measured on live traffic: labels, what they cost, and what they say."""
