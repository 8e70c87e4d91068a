"""Write the student's weights as the record of a growth says."""
