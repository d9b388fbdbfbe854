# The vendor's side of AWS PrivateLink. Written by demarc mesh privatelink: change its arguments, not this file.
terraform {
  required_version = ">= 1.6"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.60"
    }
  }
}

resource "aws_security_group" "demarc" {
  name        = "acme-privatelink"
  description = "demarc: what the load balancer may reach"
  vpc_id      = "vpc-0123456789abcdef0"
}

resource "aws_vpc_security_group_egress_rule" "node_10_2e0_2e0_2e1" {
  security_group_id = aws_security_group.demarc.id
  cidr_ipv4         = "10.0.0.1/32"
  ip_protocol       = "tcp"
  from_port         = 7443
  to_port           = 7443
}

resource "aws_vpc_security_group_egress_rule" "node_10_2e0_2e0_2e2" {
  security_group_id = aws_security_group.demarc.id
  cidr_ipv4         = "10.0.0.2/32"
  ip_protocol       = "tcp"
  from_port         = 7443
  to_port           = 7443
}

resource "aws_vpc_security_group_egress_rule" "node_10_2e0_2e0_2e3" {
  security_group_id = aws_security_group.demarc.id
  cidr_ipv4         = "10.0.0.3/32"
  ip_protocol       = "tcp"
  from_port         = 7443
  to_port           = 7443
}

resource "aws_lb" "demarc" {
  name                                                         = "acme-pl"
  load_balancer_type                                           = "network"
  internal                                                     = true
  subnets                                                      = ["subnet-0123456789abcdef0", "subnet-0123456789abcdef1"]
  security_groups                                              = [aws_security_group.demarc.id]
  enable_cross_zone_load_balancing                             = true
  enforce_security_group_inbound_rules_on_private_link_traffic = "off"
}

resource "aws_lb_target_group" "demarc" {
  name               = "acme-pl"
  port               = 7443
  protocol           = "TCP"
  target_type        = "ip"
  vpc_id             = "vpc-0123456789abcdef0"
  preserve_client_ip = "false"
  health_check {
    protocol = "TCP"
  }
}

resource "aws_lb_target_group_attachment" "node_10_2e0_2e0_2e1" {
  target_group_arn = aws_lb_target_group.demarc.arn
  target_id        = "10.0.0.1"
  port             = 7443
}

resource "aws_lb_target_group_attachment" "node_10_2e0_2e0_2e2" {
  target_group_arn = aws_lb_target_group.demarc.arn
  target_id        = "10.0.0.2"
  port             = 7443
}

resource "aws_lb_target_group_attachment" "node_10_2e0_2e0_2e3" {
  target_group_arn = aws_lb_target_group.demarc.arn
  target_id        = "10.0.0.3"
  port             = 7443
}

resource "aws_lb_listener" "demarc" {
  load_balancer_arn = aws_lb.demarc.arn
  port              = 7443
  protocol          = "TCP"
  default_action {
    type             = "forward"
    target_group_arn = aws_lb_target_group.demarc.arn
  }
}

resource "aws_vpc_endpoint_service" "demarc" {
  acceptance_required        = true
  network_load_balancer_arns = [aws_lb.demarc.arn]
  tags = {
    Name = "acme"
  }
}

data "aws_partition" "current" {
}

resource "aws_vpc_endpoint_service_allowed_principal" "customer_111122223333" {
  vpc_endpoint_service_id = aws_vpc_endpoint_service.demarc.id
  principal_arn           = join(":", ["arn", data.aws_partition.current.partition, "iam:", "111122223333", "root"])
}

resource "aws_vpc_endpoint_service_allowed_principal" "customer_arn_3aaws_3aiam_3a_3a444455556666_3arole_2fnetwork_2f_41dmin" {
  vpc_endpoint_service_id = aws_vpc_endpoint_service.demarc.id
  principal_arn           = "arn:aws:iam::444455556666:role/network/Admin"
}

output "service_name" {
  description = "Give this to the customer: demarc mesh privatelink --side customer --service"
  value       = aws_vpc_endpoint_service.demarc.service_name
}
