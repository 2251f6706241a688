"""The step, the loop around it, and the processes of a job."""
